"""Memories of fixed size, as pure functions: `(inputs, initial_state) -> (out, final_state)`."""
