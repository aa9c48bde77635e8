"""Parts of benchmarks: nothing here is run by itself."""
