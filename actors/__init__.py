"""What one Eagleray process does: plain classes, hosted by Ray in `ray_runtime`."""
