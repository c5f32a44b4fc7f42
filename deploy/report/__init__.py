"""Pages for people, made with nothing but the standard library: a device has no matplotlib."""
