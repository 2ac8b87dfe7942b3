"""Running a ring: the executor of one rank's program, and its transports."""
