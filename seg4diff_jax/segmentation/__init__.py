"""From attention maps to label maps and their measures: pure functions on arrays."""
