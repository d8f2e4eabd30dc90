"""The refinement engine: every image of an input once, by any number of workers, labels carried along."""
