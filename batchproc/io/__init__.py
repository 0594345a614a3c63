"""The disk: manifests, images, stamps, catalogues, models, progress."""
