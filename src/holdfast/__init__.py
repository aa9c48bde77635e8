"""Run training on interruptible cloud machines and lose nothing when they are taken away."""
