"""The embedded demonstration: planted lesions at known places, and how near each method comes to them."""
