"""Files of images and of labels, as people have them."""
