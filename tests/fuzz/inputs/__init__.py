"""Small sound inputs of every reader, and what is read of them."""
