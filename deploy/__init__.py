"""What runs on the device: bundles, pre-processing, runners, verification and timing. No torch."""
