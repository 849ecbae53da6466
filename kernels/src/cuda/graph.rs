//! Recorded work, and the time that work takes.

use std::fmt;
use std::ptr;
use std::sync::{Arc, PoisonError};

use cudarc::driver::sys;

use super::device::{CudaError, Device, Inner, check};
use super::memory::Allocation;

/// Recorded work that is launched as one.
pub struct Graph {
    exec: sys::CUgraphExec,
    inner: Arc<Inner>,
    _used: Vec<Arc<Allocation>>,
}

// SAFETY: as for `Inner`; launches bind the context first.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Graph")
    }
}

impl Graph {
    /// Runs the recorded work after what the stream has already.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn launch(&self) -> Result<(), CudaError> {
        self.inner.bind();
        // SAFETY: graph and stream live, and so does every buffer that the graph uses.
        check(unsafe { sys::cuGraphLaunch(self.exec, self.inner.stream) }, "launching a graph")
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        self.inner.bind();
        // SAFETY: built once, destroyed once.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}

/// A graph before it has an executable form.
struct Captured {
    graph: sys::CUgraph,
    inner: Arc<Inner>,
    used: Vec<Arc<Allocation>>,
}

impl Captured {
    fn executable(mut self) -> Result<Graph, CudaError> {
        let mut exec = ptr::null_mut();
        self.inner.bind();
        // SAFETY: the graph was captured and lives.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, self.graph, 0) };
        check(made, "building a graph")?;
        let used = std::mem::take(&mut self.used);
        Ok(Graph { exec, inner: Arc::clone(&self.inner), _used: used })
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.graph.is_null() {
            self.inner.bind();
            // SAFETY: captured once, destroyed once.
            unsafe { sys::cuGraphDestroy(self.graph) };
        }
    }
}

/// Records what `work` calls on each of `devices`, instead of running it, as one graph each, in their
/// order. What they do together wants all of them launched.
///
/// # Errors
/// [`CudaError`] of the driver, or what `work` gives.
pub fn capture_on(
    devices: &[&Device],
    work: impl FnOnce() -> Result<(), CudaError>,
) -> Result<Vec<Graph>, CudaError> {
    let mut begun = Vec::with_capacity(devices.len());
    let mut worked = devices.iter().try_for_each(|device| {
        device.begin_capture()?;
        begun.push(*device);
        Ok(())
    });
    if worked.is_ok() {
        worked = work();
    }
    // Every capture is ended, whatever `work` gave, before any of the graphs is built.
    let captured: Vec<_> = begun.into_iter().map(Device::end_capture).collect();
    worked?;
    captured.into_iter().map(|captured| captured?.executable()).collect()
}

impl Device {
    /// Records what `work` calls, instead of running it, as one graph. Buffers that it uses stay
    /// alive as long as the graph.
    ///
    /// # Errors
    /// [`CudaError`] of the driver, or what `work` gives.
    pub fn capture(
        &self,
        work: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Graph, CudaError> {
        let graph = capture_on(&[self], work)?.pop();
        graph.ok_or_else(|| CudaError::new("a capture without a graph"))
    }

    fn begin_capture(&self) -> Result<(), CudaError> {
        self.inner.bind();
        // Other threads' work must not end the capture.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        let begun = unsafe { sys::cuStreamBeginCapture_v2(self.inner.stream, mode) };
        check(begun, "starting to capture a graph")?;
        *self.capturing() = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<Captured, CudaError> {
        let used = self.capturing().take().unwrap_or_default();
        let mut graph = ptr::null_mut();
        self.inner.bind();
        // SAFETY: the stream lives and is capturing.
        let ended = unsafe { sys::cuStreamEndCapture(self.inner.stream, &mut graph) };
        let captured = Captured { graph, inner: Arc::clone(&self.inner), used };
        check(ended, "capturing a graph").map(|()| captured)
    }

    fn capturing(&self) -> std::sync::MutexGuard<'_, Option<Vec<Arc<Allocation>>>> {
        self.inner.capturing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A graph that is being captured keeps these alive.
    pub(super) fn keep_for_capture<'a>(&self, used: impl IntoIterator<Item = &'a Arc<Allocation>>) {
        if let Some(all) = self.capturing().as_mut() {
            all.extend(used.into_iter().cloned());
        }
    }

    /// Marks a point in the stream's time.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn timer(&self) -> Result<Timer, CudaError> {
        self.inner.bind();
        let mut event = ptr::null_mut();
        // SAFETY: the context is current; the event is recorded on a stream of it.
        unsafe {
            check(sys::cuEventCreate(&mut event, 0), "creating an event")?;
            let timer = Timer { event, inner: Arc::clone(&self.inner) };
            check(sys::cuEventRecord(event, self.inner.stream), "recording an event")?;
            Ok(timer)
        }
    }
}

/// A point in a stream's time.
pub struct Timer {
    event: sys::CUevent,
    inner: Arc<Inner>,
}

impl fmt::Debug for Timer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Timer")
    }
}

// SAFETY: as for `Inner`; each call binds the context first.
unsafe impl Send for Timer {}

impl Timer {
    /// Waits until it has been reached.
    ///
    /// # Errors
    /// [`CudaError`] of the work before it.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.inner.bind();
        // SAFETY: the event lives and was recorded.
        check(unsafe { sys::cuEventSynchronize(self.event) }, "running on the GPU")
    }

    /// Whether it has been reached.
    ///
    /// # Errors
    /// [`CudaError`] of the work before it.
    pub fn is_reached(&self) -> Result<bool, CudaError> {
        self.inner.bind();
        // SAFETY: the event lives and was recorded.
        match unsafe { sys::cuEventQuery(self.event) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            done => check(done, "running on the GPU").map(|()| true),
        }
    }

    /// Seconds from `self` to `end`, when both have been reached.
    ///
    /// # Errors
    /// [`CudaError`]
    pub fn seconds_until(&self, end: &Timer) -> Result<f64, CudaError> {
        self.inner.bind();
        let mut milliseconds = 0.0;
        // SAFETY: both events live and were recorded.
        unsafe {
            check(sys::cuEventSynchronize(end.event), "waiting for an event")?;
            let read = sys::cuEventElapsedTime_v2(&mut milliseconds, self.event, end.event);
            check(read, "reading an event's time")?;
        }
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.inner.bind();
        // SAFETY: created once, destroyed once.
        unsafe { sys::cuEventDestroy_v2(self.event) };
    }
}
