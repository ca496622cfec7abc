"""Any graph as an ONNX model: `table.ONNX` has one row for each operation, a file for each family of them."""
