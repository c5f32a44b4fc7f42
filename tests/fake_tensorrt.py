"""A double of TensorRT's Python API that computes with ONNX Runtime, in the style of a version.

Every class has the names that NVIDIA's bindings of this version have (data/tensorrt_api.json) and
no others, and does what edgereg needs of them. As in the original, intermediate tensors of a weakly
typed network say that they are float32; a builder that may, takes the fastest type, which is fp16;
without the flag for it, fp32; what is undefined in the original is a ContractError.

A plan is a line of JSON (who built it, its layers) and the ONNX file.
"""

import enum
import json
import sys
import types
import weakref
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from fake_cudart import ContractError, FakeCudart
from onnx import TensorProto

API = json.loads((Path(__file__).parent / "data" / "tensorrt_api.json").read_text("utf-8"))
STYLES = {"8.6": "8.6.1", "10": "10.3.0", "11": "11.4.0.106"}
_LAYERS = {
    **dict.fromkeys(("Conv",), "CONVOLUTION"),
    **dict.fromkeys(("Gemm", "MatMul"), "MATRIX_MULTIPLY"),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), "ELEMENTWISE"),
    **dict.fromkeys(("Flatten", "Reshape", "Transpose"), "SHUFFLE"),
    "Cast": "CAST",
    "DequantizeLinear": "DEQUANTIZE",
    "GlobalAveragePool": "REDUCE",
    "QuantizeLinear": "QUANTIZE",
    "Relu": "ACTIVATION",
    "Softmax": "SOFTMAX",
}
_DATATYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.INT8: "INT8",
    TensorProto.UINT8: "UINT8",
    TensorProto.BOOL: "BOOL",
    TensorProto.INT32: "INT32",
    TensorProto.INT64: "INT32",
}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "UINT8": np.uint8, "INT8": np.int8}
_SHOWN = {"FLOAT": "Row major linear FP32", "HALF": "Row major linear FP16 format"}


def install(style, *, cudart=None, **options):
    """Put a TensorRT of a style and a CUDA where edgereg looks for them; for a whole process."""
    import deploy.runtime.cudart

    cudart = cudart or FakeCudart()
    sys.modules["tensorrt"] = trt = make(STYLES[style], cudart, **options)
    deploy.runtime.cudart.load_cudart = lambda: cudart
    return trt


def make(version, cudart, *, dla_cores=0, ignores=(), flips=()):
    """Return a module like tensorrt.

    Args:
        version: One of API.
        cudart: The CUDA that it computes on.
        dla_cores: How many there are.
        ignores: Layers that the builder builds in fp32, whatever it is asked for.
        flips: Outputs whose sign is wrong.
    """
    trt = types.ModuleType("tensorrt")
    trt.__version__ = ".".join(version.split(".")[:3])
    trt.live = weakref.WeakSet()
    surface = API[version]
    for name, members in surface.items():
        if isinstance(members, dict):
            setattr(trt, name, enum.IntEnum(name, members))
    strong_only = "EXPLICIT_BATCH" not in surface["NetworkDefinitionCreationFlag"]

    class Limited:
        """Has no public name that the version's class lacks; knows what was set."""

        def __getattribute__(self, name):
            kind = object.__getattribute__(self, "__class__")
            if not name.startswith("_") and name not in surface[kind.__name__]:
                raise AttributeError(f"TensorRT {version}: {kind.__name__} has no '{name}'")
            return object.__getattribute__(self, name)

        def __setattr__(self, name, value):
            kind = object.__getattribute__(self, "__class__")
            if not name.startswith("_") and name not in surface[kind.__name__]:
                raise AttributeError(f"TensorRT {version}: {kind.__name__} has no '{name}'")
            object.__setattr__(self, name, value)

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class IHostMemory(Limited):
        def __init__(self, data):
            self._data = data

        @property
        def nbytes(self):
            return len(self._data)

        def __bytes__(self):
            return self._data

    class ITensor(Limited):
        def __init__(self, name, dtype, shape=()):
            self._name, self._dtype, self._shape = name, dtype, shape

        name = property(lambda self: self._name)
        dtype = property(lambda self: self._dtype)
        shape = property(lambda self: self._shape)

    class ILayer(Limited):
        def __init__(self, name, kind, inputs, outputs, real):
            self._name, self._type, self._inputs, self._outputs = name, kind, inputs, outputs
            self._real = real  # the type that the graph gives it
            self._precision = self._output_type = None

        name = property(lambda self: self._name)
        type = property(lambda self: self._type)
        num_inputs = property(lambda self: len(self._inputs))
        num_outputs = property(lambda self: len(self._outputs))

        def get_input(self, i):
            return self._inputs[i]

        def get_output(self, i):
            return self._outputs[i]

        def set_output_type(self, i, dtype):
            self._output_type = dtype

        @property
        def precision(self):
            return self._precision

        @precision.setter
        def precision(self, dtype):
            self._precision = dtype

    class ICastLayer(ILayer):
        to_type = property(lambda self: self._real)

    class INetworkDefinition(Limited):
        def __init__(self, is_strong):
            self._is_strong = is_strong
            self._inputs, self._layers, self._model = [], [], None

        num_inputs = property(lambda self: len(self._inputs))
        num_layers = property(lambda self: len(self._layers))

        def get_input(self, i):
            return self._inputs[i]

        def get_layer(self, i):
            layer = self._layers[i]
            layer.__class__ = ILayer  # the bindings hand out the base class
            return layer

    class ParserError(Limited):
        def __init__(self, index, node):
            self._index, self._node = index, node

        def node(self):
            return self._index

        def node_name(self):
            return self._node.name

        def node_operator(self):
            return self._node.op_type

        def desc(self):
            return "No importer registered for op: " + self._node.op_type

    class OnnxParser(Limited):
        def __init__(self, network, logger):
            self._network, self._errors = network, []

        num_errors = property(lambda self: len(self._errors))

        def get_error(self, i):
            return self._errors[i]

        def parse(self, data):
            model = onnx.shape_inference.infer_shapes(onnx.load_from_string(data))
            graph, network = model.graph, self._network
            types_of = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
            for value in (*graph.input, *graph.output):
                types_of[value.name] = value.type.tensor_type.elem_type
            types_of |= {tensor.name: tensor.data_type for tensor in graph.initializer}
            real = {name: trt.DataType[_DATATYPES[kind]] for name, kind in types_of.items()}
            sources = {tensor.name for tensor in graph.initializer}
            tensors = {}
            for value in graph.input:
                dims = value.type.tensor_type.shape.dim
                shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
                tensors[value.name] = ITensor(value.name, real[value.name], shape)
                network._inputs.append(tensors[value.name])
            floats = (trt.DataType.FLOAT, trt.DataType.HALF)
            said = {
                name: trt.DataType.FLOAT if kind in floats and not network._is_strong else kind
                for name, kind in real.items()
            }
            for name in sources:
                tensors[name] = ITensor(name, said[name])
                layer = ILayer(name, trt.LayerType.CONSTANT, [], [tensors[name]], real[name])
                network._layers.append(layer)
            for index, node in enumerate(graph.node):
                if node.op_type not in _LAYERS:
                    self._errors.append(ParserError(index, node))
                    return False
                name = node.output[0]
                tensors[name] = ITensor(name, said[name])
                inputs = [tensors.get(given) for given in node.input]
                kind = trt.LayerType[_LAYERS[node.op_type]]
                network._layers.append(
                    ILayer(node.name or name, kind, inputs, [tensors[name]], real[name])
                )
            network._model = data
            return True

    class ITimingCache(Limited):
        def __init__(self, data):
            self._data = data

        def serialize(self):
            return IHostMemory(self._data + b"+")

    class IOptimizationProfile(Limited):
        def __init__(self):
            self._shapes = {}

        def set_shape(self, name, smallest, usual, largest):
            self._shapes[name] = [list(smallest), list(usual), list(largest)]

    class IBuilderConfig(Limited):
        def __init__(self):
            self._flags = {trt.BuilderFlag.TF32}
            self._pools, self._profile, self._cache = {}, None, None
            self.default_device_type, self.DLA_core = trt.DeviceType.GPU, -1

        def set_flag(self, flag):
            self._flags.add(flag)

        def clear_flag(self, flag):
            self._flags.discard(flag)

        def set_memory_pool_limit(self, pool, size_bytes):
            self._pools[pool] = size_bytes

        def add_optimization_profile(self, profile):
            self._profile = profile

        def create_timing_cache(self, data):
            return None if data.startswith(b"corrupt") else ITimingCache(data)

        def set_timing_cache(self, cache, ignore_mismatch):
            self._cache = cache
            return True

        def get_timing_cache(self):
            return self._cache

        def can_run_on_DLA(self, layer):  # noqa: N802
            return layer.type != trt.LayerType.SOFTMAX

    class Builder(Limited):
        def __init__(self, logger):
            _require_probe(cudart)
            self._logger, self._config = logger, None

        num_DLA_cores = property(lambda self: dla_cores)  # noqa: N815

        def create_network(self, flags=0):
            known = trt.NetworkDefinitionCreationFlag
            strong = hasattr(known, "STRONGLY_TYPED") and flags >> int(known.STRONGLY_TYPED) & 1
            batch = strong_only or strong or flags >> int(known.EXPLICIT_BATCH) & 1
            if not batch and version.startswith("8"):
                raise ContractError("an implicit batch: the parser takes explicit ones only")
            return INetworkDefinition(bool(strong_only or strong))

        def create_builder_config(self):
            return IBuilderConfig()

        def create_optimization_profile(self):
            return IOptimizationProfile()

        def build_serialized_network(self, network, config):
            monitor = getattr(config, "progress_monitor", None)
            if monitor is not None:
                monitor.phase_start("Building", None, 2)
                monitor.step_complete("Building", 0)
                monitor.phase_finish("Building")
            is_dynamic = any(-1 in tensor.shape for tensor in network._inputs)
            if is_dynamic and config._profile is None:
                self._logger.log(ILogger.ERROR, "no optimization profile has been defined")
                return None
            header = {
                "version": version,
                "gpu": cudart.gpu,
                "verbosity": int(config.profiling_verbosity),
                "profile": config._profile._shapes if config._profile else {},
                "dla": config.DLA_core if config.default_device_type else None,
                "layers": [_built(network, config, layer) for layer in network._layers],
            }
            header["layers"] = [layer for layer in header["layers"] if layer]
            return IHostMemory(json.dumps(header).encode() + b"\n" + network._model)

    def _built(network, config, layer):
        """The layer as an engine has it, or None: constants, casts and Q/DQ are fused away."""
        kinds = trt.LayerType
        if layer._type in (kinds.CONSTANT, kinds.CAST, kinds.QUANTIZE, kinds.DEQUANTIZE):
            return None
        makers = {tensor._name: other for other in network._layers for tensor in other._outputs}
        fed = [makers.get(tensor._name) for tensor in layer._inputs if tensor is not None]
        is_quantized = bool(fed) and fed[0] is not None and fed[0]._type == kinds.DEQUANTIZE
        is_product = layer._type in (kinds.CONVOLUTION, kinds.MATRIX_MULTIPLY)
        flags = {flag.name for flag in config._flags}
        dtype = layer._real.name
        if not network._is_strong:
            dtype = "HALF" if "FP16" in flags else "FLOAT"
            if "OBEY_PRECISION_CONSTRAINTS" in flags and layer._precision is not None:
                dtype = layer._precision.name
        if is_quantized and is_product and (network._is_strong or "INT8" in flags):
            shown = "Thirty-two wide channel vectorized row major Int8 format"
        else:
            shown = _SHOWN[dtype]
        if layer._name in ignores:
            shown = _SHOWN["FLOAT"]
        side = [{"Name": layer._name, "Format/Datatype": shown}]
        return {"Name": layer._name, "LayerType": "kgen", "Inputs": side, "Outputs": side}

    class EngineInspector(Limited):
        def __init__(self, engine):
            self._engine = engine
            self.execution_context = None

        def get_engine_information(self, form):
            layers = self._engine._header["layers"]
            if self._engine._header["verbosity"] != int(trt.ProfilingVerbosity.DETAILED):
                layers = [layer["Name"] for layer in layers]
            key = "I/O Tensors" if strong_only else "Bindings"
            return json.dumps({"Layers": layers, key: []})

    class ICudaEngine(Limited):
        def __init__(self, header, model):
            self._header, self._model = header, onnx.load_from_string(model)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
            graph = self._model.graph
            self._tensors = {}
            for mode, values in ((1, graph.input), (2, graph.output)):
                for value in values:
                    dims = value.type.tensor_type.shape.dim
                    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
                    dtype = _DATATYPES[value.type.tensor_type.elem_type]
                    self._tensors[value.name] = (trt.TensorIOMode(mode), dtype, shape)
            trt.live.add(self)

        num_io_tensors = property(lambda self: len(self._tensors))

        def get_tensor_name(self, i):
            return list(self._tensors)[i]

        def get_tensor_mode(self, name):
            return self._tensors[name][0]

        def get_tensor_dtype(self, name):
            return trt.DataType[self._tensors[name][1]]

        def get_tensor_shape(self, name):
            return self._tensors[name][2]

        def create_execution_context(self):
            return IExecutionContext(self)

        def create_engine_inspector(self):
            return EngineInspector(self)

    class IExecutionContext(Limited):
        def __init__(self, engine):
            self._engine, self._addresses, self._shapes, self._has_run = engine, {}, {}, False
            trt.live.add(self)

        def set_tensor_address(self, name, address):
            self._addresses[name] = address
            return name in self._engine._tensors

        def set_input_shape(self, name, shape):
            mode, _, wanted = self._engine._tensors[name]
            profile = self._engine._header["profile"].get(name)
            low, high = (profile[0], profile[2]) if profile else (wanted, wanted)
            fits = mode == trt.TensorIOMode.INPUT and len(shape) == len(wanted)
            fits = fits and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
            if fits:
                self._shapes[name] = tuple(shape)
            return fits

        def execute_async_v3(self, stream):
            tensors = self._engine._tensors
            shapes = dict(self._shapes)
            for name, (mode, _, shape) in tensors.items():
                if name not in self._addresses:
                    raise ContractError(f"the address of '{name}' is not set")
                if mode == trt.TensorIOMode.INPUT and name not in shapes:
                    if -1 in shape:
                        raise ContractError(f"the shape of '{name}' is not set")
                    shapes[name] = shape
            if cudart.is_capturing(stream) and not self._has_run:
                raise ContractError("a first inference is captured, which allocates")
            self._has_run = True
            addresses = dict(self._addresses)
            cudart.enqueue(stream, lambda: self._compute(addresses, shapes))
            return True

        def _compute(self, addresses, shapes):
            feeds = {}
            for name, shape in shapes.items():
                dtype = _NUMPY[self._engine._tensors[name][1]]
                size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
                memory = bytes(cudart.memory(addresses[name], size_bytes))
                feeds[name] = np.frombuffer(memory, dtype).reshape(shape)
            names = [name for name, (mode, *_) in self._engine._tensors.items() if int(mode) == 2]
            for name, value in zip(names, self._engine._session.run(names, feeds), strict=True):
                value = -value if name in flips else value
                cudart.memory(addresses[name], value.nbytes)[:] = value.tobytes()

    class Runtime(Limited):
        def __init__(self, logger):
            _require_probe(cudart)
            self._logger = logger
            self.DLA_core = -1

        def deserialize_cuda_engine(self, plan):
            first, _, model = bytes(plan).partition(b"\n")
            try:
                header = json.loads(first)
            except ValueError:
                header = {}
            for key, here in (("version", version), ("gpu", cudart.gpu)):
                if header.get(key) != here:
                    text = f"serialization: {key} {header.get(key)} does not match {here}"
                    self._logger.log(ILogger.ERROR, text)
                    return None
            if header["dla"] is not None and self.DLA_core != header["dla"]:
                self._logger.log(ILogger.ERROR, "the engine is for another DLA core")
                return None
            return ICudaEngine(header, model)

    class IProgressMonitor:
        def __init__(self):
            pass

    made = [ILogger, Builder, OnnxParser, Runtime, ICastLayer]
    made += [IProgressMonitor] if "IProgressMonitor" in surface else []
    for kind in made:
        setattr(trt, kind.__name__, kind)
    return trt


def _require_probe(cudart):
    if not cudart.was_probed or not cudart.devices:
        raise ContractError("TensorRT is touched before a GPU was found: a crash")
