"""Arithmetic on trees and on numbers that stays in range, derivatives included."""
