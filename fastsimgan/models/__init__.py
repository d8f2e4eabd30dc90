"""Networks of the paper: refiner and discriminator (§3.1, §3.2), and the task networks that judge them."""
