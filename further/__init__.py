"""Techniques that build on the core. The core never imports them."""
