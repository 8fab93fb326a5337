"""The front: what clients talk to. Authentication, limits, ids, metrics; the engine stays on loopback behind it."""
