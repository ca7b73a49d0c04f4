"""What leaves the house: ONNX files and packed integers."""
