"""volsal inside napari: what its plugin manifest, ``napari.yaml``, offers, and the window that `volsal view` opens."""
