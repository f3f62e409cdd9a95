"""Records of what was measured: the JSON contract. Nothing of the project but errors is imported here."""
