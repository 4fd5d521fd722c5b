"""The logit cache: one Zarr v3 group of sparse soft labels. Needs numpy, zarr and pydantic; never torch."""
