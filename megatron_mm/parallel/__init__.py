"""How many processes become one run: launch detection, process groups, and Megatron-Core on a CPU."""
