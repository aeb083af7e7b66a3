"""Salt segmentation of seismic tiles: a distributed search for the best model your machines can train."""

__version__ = "0.1.0"
