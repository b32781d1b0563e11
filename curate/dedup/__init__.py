"""Which images are copies of others, and which of each group stays."""
