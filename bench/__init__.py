"""The bench: named shapes, peers that are checked, interleaved timing, reports. Installed as `interformer_bench`."""
