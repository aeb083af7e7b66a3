"""One `saltray.tune` from its checks to its submission, and what is seen of it."""
