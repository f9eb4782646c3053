"""Routes, one controller a resource."""
