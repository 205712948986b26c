"""What networks are written in: operations, their two executors, and parts that families share."""
