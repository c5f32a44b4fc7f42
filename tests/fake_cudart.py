"""A double of CUDA's runtime: memory, streams and graphs as late and as strict as real ones.

Work on a stream is done when somebody waits for the stream, and not before: whoever reads too early
reads the old bytes. Device addresses point nowhere. What CUDA leaves undefined is an error here.
"""

import ctypes

SUCCESS, OUT_OF_MEMORY, NO_DEVICE, CAPTURE_UNSUPPORTED = 0, 2, 100, 900
_FIRST_DEVICE_ADDRESS, _ALIGNMENT = 0x7F00_0000_0000, 512


class ContractError(AssertionError):
    """Something that on a device is undefined: a crash, or a wrong answer."""


class FakeCudart:
    """What `load_cudart` returns in tests; see `deploy.runtime.cudart.Runtime`."""

    def __init__(self, *, gpu="Orin (fake)", sm=(8, 7), devices=1, memory_bytes=1 << 30):
        self.gpu, self.sm, self.devices, self.memory_bytes = gpu, sm, devices, memory_bytes
        self.was_probed = False
        self.calls = []
        self.device, self.pinned = {}, {}
        self.streams, self.captures, self.graphs, self.executables = {}, {}, {}, {}
        self._next_address, self._next_handle = _FIRST_DEVICE_ADDRESS, 1

    def call(self, function, *inputs):
        self.calls.append(function)
        return getattr(self, f"_{function}")(*inputs)

    def error_name(self, code):
        names = {2: "cudaErrorMemoryAllocation", 100: "cudaErrorNoDevice"}
        return names.get(code, f"fake error {code}")

    def live(self):
        """All that was made and not yet freed."""
        owned = (self.device, self.pinned, self.streams, self.graphs, self.executables)
        return [handle for kind in owned for handle in kind]

    def enqueue(self, stream, work):
        """Put work on a stream, or into the graph that is recorded from it."""
        if stream not in self.streams:
            raise ContractError(f"work on the stream {stream}, which is not there")
        target = self.captures if stream in self.captures else self.streams
        target[stream].append(work)

    def is_capturing(self, stream):
        return stream in self.captures

    def memory(self, address, size_bytes):
        """The device's memory from an address on, as something that can be written."""
        for start, data in self.device.items():
            if start <= address and address + size_bytes <= start + len(data):
                return memoryview(data)[address - start : address - start + size_bytes]
        known = self.device.get(address)
        state = "is not there or was freed" if known is None else f"holds {len(known)}"
        raise ContractError(f"{size_bytes} bytes at {address:#x}, which {state}")

    def _cudaGetDeviceCount(self):  # noqa: N802
        self.was_probed = True
        return (SUCCESS, (self.devices,)) if self.devices else (NO_DEVICE, ())

    def _cudaGetDeviceProperties(self, device):  # noqa: N802
        return SUCCESS, (self.gpu.encode(),)

    def _cudaDeviceGetAttribute(self, attribute, device):  # noqa: N802
        return SUCCESS, ({75: self.sm[0], 76: self.sm[1], 18: 1}[attribute],)

    def _cudaMemGetInfo(self):  # noqa: N802
        return SUCCESS, (self._free_bytes(), self.memory_bytes)

    def _free_bytes(self):
        return self.memory_bytes - sum(map(len, self.device.values()))

    def _cudaMalloc(self, size_bytes):  # noqa: N802
        if self.captures:
            return CAPTURE_UNSUPPORTED, ()
        if size_bytes > self._free_bytes():
            return OUT_OF_MEMORY, ()
        address = self._next_address
        self._next_address += -(-size_bytes // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
        self.device[address] = bytearray(b"\xcd" * size_bytes)
        return SUCCESS, (address,)

    def _cudaFree(self, address):  # noqa: N802
        self._refuse_pending("freed memory")
        if self.device.pop(address, None) is None:
            raise ContractError(f"{address:#x} is freed twice, or was never allocated")
        return SUCCESS, ()

    def _cudaMallocHost(self, size_bytes):  # noqa: N802
        if self.captures:
            return CAPTURE_UNSUPPORTED, ()
        buffer = (ctypes.c_uint8 * size_bytes)(*b"\xcd" * size_bytes)
        self.pinned[ctypes.addressof(buffer)] = buffer
        return SUCCESS, (ctypes.addressof(buffer),)

    def _cudaFreeHost(self, address):  # noqa: N802
        self._refuse_pending("freed memory")
        if self.pinned.pop(address, None) is None:
            raise ContractError(f"{address:#x} is freed twice, or was never pinned")
        return SUCCESS, ()

    def _refuse_pending(self, what):
        if any(self.streams.values()):
            raise ContractError(f"{what} while work is pending: nobody waited for the stream")

    def _cudaStreamCreateWithFlags(self, flags):  # noqa: N802
        return SUCCESS, (self._add(self.streams, []),)

    def _cudaStreamDestroy(self, stream):  # noqa: N802
        self._refuse_pending("a destroyed stream")
        self._take(self.streams, stream)
        return SUCCESS, ()

    def _cudaStreamSynchronize(self, stream):  # noqa: N802
        if stream in self.captures:
            return CAPTURE_UNSUPPORTED, ()
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()
        return SUCCESS, ()

    def _cudaMemcpyAsync(self, target, source, size_bytes, kind, stream):  # noqa: N802
        device, host = (target, source) if kind == 1 else (source, target)
        self._check_pinned(host, size_bytes)
        self.memory(device, size_bytes)

        def copy():
            self._check_pinned(host, size_bytes)
            memory = self.memory(device, size_bytes)
            if kind == 1:
                memory[:] = ctypes.string_at(host, size_bytes)
            else:
                ctypes.memmove(host, bytes(memory), size_bytes)

        self.enqueue(stream, copy)
        return SUCCESS, ()

    def _check_pinned(self, address, size_bytes):
        for start, buffer in self.pinned.items():
            if start <= address and address + size_bytes <= start + len(buffer):
                return
        raise ContractError(f"{size_bytes} bytes at {address:#x} of the host are not pinned")

    def _cudaStreamBeginCapture(self, stream, mode):  # noqa: N802
        self._refuse_pending("a capture")
        self.captures[stream] = []
        return SUCCESS, ()

    def _cudaStreamEndCapture(self, stream):  # noqa: N802
        return SUCCESS, (self._add(self.graphs, self.captures.pop(stream)),)

    def _cudaGraphInstantiate(self, graph, flags):  # noqa: N802
        return SUCCESS, (self._add(self.executables, list(self.graphs[graph])),)

    def _cudaGraphLaunch(self, executable, stream):  # noqa: N802
        if executable not in self.executables:
            raise ContractError("a graph is launched that is not there")
        for step in self.executables[executable]:
            self.enqueue(stream, step)
        return SUCCESS, ()

    def _cudaGraphExecDestroy(self, executable):  # noqa: N802
        self._take(self.executables, executable)
        return SUCCESS, ()

    def _cudaGraphDestroy(self, graph):  # noqa: N802
        self._take(self.graphs, graph)
        return SUCCESS, ()

    def _add(self, kind, value):
        self._next_handle += 1
        kind[self._next_handle] = value
        return self._next_handle

    def _take(self, kind, handle):
        if handle not in kind:
            raise ContractError(f"the handle {handle} is destroyed twice, or was never made")
        del kind[handle]
