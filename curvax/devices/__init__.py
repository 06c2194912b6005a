"""Devices: named axes to average over, and the layouts of arrays on a mesh."""
