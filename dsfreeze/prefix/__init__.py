"""The prefix cache: the states that leave the frozen prefix, stored once for each example, and the suffix that reads them."""
