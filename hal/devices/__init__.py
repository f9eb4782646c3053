"""The device axis: where memory lives and how work is ordered."""
