"""The demonstration: what the product promises, shown with faults, and checked from outside."""
