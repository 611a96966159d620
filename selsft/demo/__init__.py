"""The demo: real facts, injected noise, three ways to train on them (docs/demo.md). Start it with `selsft demo`."""
