"""Measures the fused loss against other implementations; `selsft bench` on the command line."""
