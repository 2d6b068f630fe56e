"""What a run will need, before anybody pays for the chips."""
