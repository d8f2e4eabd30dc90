"""Networks trained on sets of images and judged on real ones."""
