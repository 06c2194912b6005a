"""Named device axes to average over, and the sharding of arrays on explicit meshes."""
