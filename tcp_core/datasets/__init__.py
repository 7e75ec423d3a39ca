"""Images to train on: in memory (`images`), decoded while training (`streams`), from many places (`sources`)."""
