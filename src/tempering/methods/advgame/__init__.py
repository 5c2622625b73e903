"""Attacker and defender trained together on preferences, and the attacker as a red-teamer (AdvGame)."""
