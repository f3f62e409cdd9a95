"""What is measured: accuracy, latency, features; and the images that accuracy is measured on."""
