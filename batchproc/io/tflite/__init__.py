"""TFLite files made of ONNX ones, in float or in 8-bit integers throughout; without TensorFlow.

`lower` reads the network (`onnx_graph`) into a `graph` of TFLite's operators, `ranges` runs it on real stamps,
`integers` turns it into integers by what was seen, `write` makes the file. Needs the packages ``onnx`` and
``ai-edge-litert`` (extra ``quantise``).
"""
