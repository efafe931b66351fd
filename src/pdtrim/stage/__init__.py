"""The two stages: what a block does in each, and the simulator that runs both in one process."""
