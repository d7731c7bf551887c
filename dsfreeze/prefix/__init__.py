"""The prefix cache: the states that leave the frozen prefix, computed once for each example, and the suffix that reads them."""
