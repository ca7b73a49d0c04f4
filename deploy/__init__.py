"""Formats for deployment: ONNX files and packed integers."""
