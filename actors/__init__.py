"""Everything that lives in a Ray process of its own."""
