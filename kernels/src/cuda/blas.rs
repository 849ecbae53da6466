//! Matrix products on tensor cores by cublasLt, their plans kept.

use std::collections::HashMap;
use std::ptr;

use cudarc::cublaslt::sys;

use super::device::{CudaError, Device};
use super::memory::Buffer;

/// Scratch memory of the products, in bytes: what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Plans kept. Prefill chunks come in many sizes; a full cache starts anew.
const PLANS: usize = 1024;

fn check(status: sys::cublasStatus_t, what: &str) -> Result<(), CudaError> {
    match status {
        sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        other => Err(CudaError::new(format!("{what}: {other:?}"))),
    }
}

/// `y[m][n] = x[m][k] · w[n][k]ᵀ`, rows of `y` `stride` apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) stride: usize,
}

/// A matrix layout, destroyed when dropped.
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(
        dtype: sys::cudaDataType_t,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Result<Self, CudaError> {
        let mut layout = ptr::null_mut();
        // SAFETY: `layout` is written.
        let made = unsafe {
            let (rows, cols, stride) = (rows as u64, cols as u64, stride as i64);
            sys::cublasLtMatrixLayoutCreate(&mut layout, dtype, rows, cols, stride)
        };
        check(made, "describing a matrix")?;
        Ok(Self(layout))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

struct Operation(sys::cublasLtMatmulDesc_t);

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

/// How a shape is computed.
struct Plan {
    operation: Operation,
    weights: Layout,
    input: Layout,
    output: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// A cublasLt handle with its plans and workspace.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    plans: HashMap<Shape, Plan>,
    workspace: u64,
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: created once, destroyed once; its plans are gone.
        unsafe {
            sys::cublasLtDestroy(self.handle);
            cudarc::driver::sys::cuMemFree_v2(self.workspace);
        }
    }
}

impl Blas {
    fn new() -> Result<Self, CudaError> {
        let mut handle = ptr::null_mut();
        // SAFETY: the library is there: `Device::open` asked.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, "starting cublasLt")?;
        let mut workspace = 0;
        // SAFETY: the context is current.
        let done = unsafe { cudarc::driver::sys::cuMemAlloc_v2(&mut workspace, WORKSPACE) };
        let blas = Self { handle, plans: HashMap::new(), workspace };
        match done {
            cudarc::driver::sys::CUresult::CUDA_SUCCESS => Ok(blas),
            other => Err(CudaError::new(format!("memory for matrix products: {other:?}"))),
        }
    }

    /// cublasLt is column-major: `yᵀ[n][m] = (wᵀ)ᵀ · xᵀ`, with `w` stored as `[k][n]`.
    fn plan(&mut self, shape: Shape) -> Result<&Plan, CudaError> {
        if self.plans.len() >= PLANS && !self.plans.contains_key(&shape) {
            self.plans.clear();
        }
        match self.plans.entry(shape) {
            std::collections::hash_map::Entry::Occupied(plan) => Ok(plan.into_mut()),
            std::collections::hash_map::Entry::Vacant(free) => {
                Ok(free.insert(make_plan(self.handle, shape)?))
            }
        }
    }
}

fn make_plan(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Plan, CudaError> {
    use sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
    use sys::cublasLtMatmulDescAttributes_t as D;
    use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
    let Shape { m, n, k, stride } = shape;
    let mut operation = ptr::null_mut();
    // SAFETY: `operation` is written.
    let made =
        unsafe { sys::cublasLtMatmulDescCreate(&mut operation, CUBLAS_COMPUTE_32F, CUDA_R_32F) };
    check(made, "describing a product")?;
    let operation = Operation(operation);
    for (attribute, transposed) in
        [(D::CUBLASLT_MATMUL_DESC_TRANSA, 1i32), (D::CUBLASLT_MATMUL_DESC_TRANSB, 0)]
    {
        // SAFETY: the attribute is an int of four bytes.
        let set = unsafe {
            let value = ptr::from_ref(&transposed).cast();
            sys::cublasLtMatmulDescSetAttribute(operation.0, attribute, value, 4)
        };
        check(set, "describing a product")?;
    }
    let weights = Layout::new(CUDA_R_16BF, k, n, k)?;
    let input = Layout::new(CUDA_R_16BF, k, m, k)?;
    let output = Layout::new(CUDA_R_32F, n, m, stride)?;
    let mut preference = ptr::null_mut();
    // SAFETY: `preference` is written.
    let made = unsafe { sys::cublasLtMatmulPreferenceCreate(&mut preference) };
    check(made, "stating preferences")?;
    let preference = Preference(preference);
    use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as MAX;
    // SAFETY: the attribute is a 64-bit number.
    let set = unsafe {
        let value = ptr::from_ref(&(WORKSPACE as u64)).cast();
        sys::cublasLtMatmulPreferenceSetAttribute(preference.0, MAX, value, 8)
    };
    check(set, "stating preferences")?;
    // SAFETY: plain numbers and an enum whose 0 is `SUCCESS`.
    let mut result: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
    let mut found = 0;
    // SAFETY: all descriptions live; one result is asked for and there is room for one.
    let asked = unsafe {
        sys::cublasLtMatmulAlgoGetHeuristic(
            handle,
            operation.0,
            weights.0,
            input.0,
            output.0,
            output.0,
            preference.0,
            1,
            &mut result,
            &mut found,
        )
    };
    check(asked, &format!("choosing a way to multiply {m} x {k} by {k} x {n}"))?;
    if found == 0 {
        return Err(CudaError::new(format!("cublasLt cannot multiply {m} x {k} by {k} x {n}")));
    }
    Ok(Plan { operation, weights, input, output, algorithm: result.algo })
}

impl Device {
    /// A product of bf16 matrices on tensor cores; `w`, `x` and `y` begin at the given elements.
    pub(super) fn multiply(
        &self,
        shape: Shape,
        (w, w_at): (&Buffer<u8>, usize),
        x: &Buffer<u16>,
        (y, y_at): (&mut Buffer<f32>, usize),
    ) -> Result<(), CudaError> {
        let Shape { m, n, k, stride } = shape;
        assert!(w.len() >= w_at + 2 * n * k && x.len() >= m * k, "multiply: inputs");
        assert!(stride >= n && y.len() >= y_at + (m - 1) * stride + n, "multiply: output");
        self.inner.bind();
        let mut blas = self.inner.blas.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if blas.is_none() {
            *blas = Some(Blas::new()?);
        }
        let Some(blas) = blas.as_mut() else { return Ok(()) };
        let (handle, workspace) = (blas.handle, blas.workspace);
        let plan = blas.plan(shape)?;
        let (alpha, beta) = (1f32, 0f32);
        // SAFETY: the descriptions match the buffers' sizes, checked above; alpha and beta are read
        // before the call returns; the workspace is used by this stream only.
        let done = unsafe {
            let y = y.address(y_at) as *mut std::ffi::c_void;
            sys::cublasLtMatmul(
                handle,
                plan.operation.0,
                ptr::from_ref(&alpha).cast(),
                w.address(w_at) as *const _,
                plan.weights.0,
                x.address(0) as *const _,
                plan.input.0,
                ptr::from_ref(&beta).cast(),
                y,
                plan.output.0,
                y,
                plan.output.0,
                &plan.algorithm,
                workspace as *mut _,
                WORKSPACE,
                self.inner.stream.cast(),
            )
        };
        check(done, "multiplying matrices")?;
        self.keep_for_capture([w.allocation(), x.allocation(), y.allocation()]);
        Ok(())
    }
}
