"""A stand-in for the package that Nsight Systems gives its recipes: as much of it as ours uses, by documented names."""
