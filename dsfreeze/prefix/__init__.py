"""The prefix cache: hidden states that leave the frozen bottom layers, stored once for each example."""
