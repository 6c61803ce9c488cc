"""Makes label maps from attention maps, and scores them: pure functions on arrays."""
