//! The functions of an MPI library, behind one interface whatever the type of its handles.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::ptr;

use libloading::os::unix::Library;

use super::abi::{Abi, Value, Values};

/// The code of an error, which [`Calls::explain`] puts into words.
pub(super) type Code = c_int;

/// A message that MPI still sends or receives.
#[derive(Debug)]
pub(super) struct Request(usize);

/// What this crate calls of MPI, on all ranks of the job. Every one of them must be called by the thread that called [`init`](Self::init).
pub(super) trait Calls {
    /// Starts MPI. Errors no longer end the process afterwards. Returns whether other threads may exist.
    fn init(&self) -> Result<bool, Code>;
    fn rank(&self) -> Result<usize, Code>;
    fn size(&self) -> Result<usize, Code>;
    fn host(&self) -> Result<String, Code>;
    /// Starts to send.
    ///
    /// # Safety
    /// The bytes stay where they are, unchanged, until [`test`](Self::test) has said that it is done.
    unsafe fn send(
        &self,
        bytes: *const u8,
        length: usize,
        to: usize,
        tag: c_int,
    ) -> Result<Request, Code>;
    /// Starts to receive.
    ///
    /// # Safety
    /// The bytes stay where they are, and nobody else touches them, until [`test`](Self::test) has said that it is done.
    unsafe fn receive(
        &self,
        bytes: *mut u8,
        length: usize,
        from: usize,
        tag: c_int,
    ) -> Result<Request, Code>;
    /// Lets MPI work, and gives the number of bytes of a message that is done; it is of no use for one that was sent. After `Some` or an error the
    /// request is over.
    fn test(&self, request: &mut Request) -> Result<Option<usize>, Code>;
    /// Asks MPI to forget a message that nobody has sent. [`test`](Self::test) says when it has.
    fn cancel(&self, request: &mut Request);
    /// Whether the error is that a message was longer than the room for it.
    fn is_truncated(&self, code: Code) -> bool;
    fn explain(&self, code: Code) -> String;
    /// Ends all processes of the job. May return.
    fn abort(&self, code: c_int);
    fn finalize(&self);
}

/// The type of a family's handles.
trait Handle: Copy + 'static {
    fn from_number(number: usize) -> Self;
    fn number(self) -> usize;
}

impl Handle for c_int {
    fn from_number(number: usize) -> Self {
        number as Self
    }

    fn number(self) -> usize {
        self as usize
    }
}

impl Handle for *mut c_void {
    fn from_number(number: usize) -> Self {
        ptr::with_exposed_provenance_mut(number)
    }

    fn number(self) -> usize {
        self.expose_provenance()
    }
}

/// Room for an `MPI_Status` of any family; the largest has 32 bytes.
type Status = [u64; 32];

/// Longer than what any family writes: at most 8192 bytes.
pub(super) const TEXT: usize = 16 * 1024;

macro_rules! functions {
    ($($name:ident: $symbol:literal ($($argument:ty),*);)*) => {
        /// The functions, for handles of type `H`.
        struct Functions<H> {
            $($name: unsafe extern "C" fn($($argument),*) -> c_int,)*
        }

        impl<H: Handle> Functions<H> {
            /// # Safety
            /// The library is an MPI library whose handles are of type `H`.
            unsafe fn load(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: MPI's standard gives these functions these arguments; the caller answers for the handles.
                    $($name: *unsafe { library.get($symbol)? },)*
                })
            }
        }
    };
}

functions! {
    init: "MPI_Init_thread"(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int);
    set_errors: "MPI_Comm_set_errhandler"(H, H);
    rank: "MPI_Comm_rank"(H, *mut c_int);
    size: "MPI_Comm_size"(H, *mut c_int);
    host: "MPI_Get_processor_name"(*mut c_char, *mut c_int);
    send: "MPI_Isend"(*const c_void, c_int, H, c_int, c_int, H, *mut H);
    receive: "MPI_Irecv"(*mut c_void, c_int, H, c_int, c_int, H, *mut H);
    test: "MPI_Test"(*mut H, *mut c_int, *mut Status);
    count: "MPI_Get_count"(*const Status, H, *mut c_int);
    cancel: "MPI_Cancel"(*mut H);
    error_class: "MPI_Error_class"(c_int, *mut c_int);
    error_string: "MPI_Error_string"(c_int, *mut c_char, *mut c_int);
    abort: "MPI_Abort"(H, c_int);
    finalize: "MPI_Finalize"();
}

/// Functions together with the handles that they are given.
struct Bound<H> {
    functions: Functions<H>,
    values: &'static Values,
    world: H,
    byte: H,
    errors_return: H,
}

/// The functions of a library that stays loaded for as long as the process lives.
///
/// # Safety
/// The library is an MPI library of this family.
pub(super) unsafe fn bind(
    library: &'static Library,
    abi: Abi,
) -> Result<Box<dyn Calls>, libloading::Error> {
    Ok(match abi {
        // SAFETY: the caller says which family it is, and these are its handles' types.
        Abi::Mpich => Box::new(unsafe { Bound::<c_int>::load(library, abi.values())? }),
        Abi::OpenMpi | Abi::Standard => {
            // SAFETY: as above.
            Box::new(unsafe { Bound::<*mut c_void>::load(library, abi.values())? })
        }
    })
}

impl<H: Handle> Bound<H> {
    /// # Safety
    /// As [`bind`].
    unsafe fn load(
        library: &'static Library,
        values: &'static Values,
    ) -> Result<Self, libloading::Error> {
        let handle = |value: Value| {
            Ok(H::from_number(match value {
                Value::Number(number) => number,
                Value::Address(symbol) => {
                    // SAFETY: only the address of the variable is taken; whatever it is, it is not read.
                    let variable = unsafe { library.get::<*mut c_void>(symbol)? };
                    variable.as_raw_ptr().expose_provenance()
                }
            }))
        };
        Ok(Self {
            // SAFETY: the caller's.
            functions: unsafe { Functions::load(library)? },
            values,
            world: handle(values.world)?,
            byte: handle(values.byte)?,
            errors_return: handle(values.errors_return)?,
        })
    }

    /// A number that a function of the communicator writes.
    fn number(
        &self,
        function: unsafe extern "C" fn(H, *mut c_int) -> c_int,
    ) -> Result<usize, Code> {
        let mut number = 0;
        // SAFETY: MPI runs, and writes one int.
        checked(unsafe { function(self.world, &raw mut number) })?;
        Ok(number as usize)
    }
}

fn checked(code: Code) -> Result<(), Code> {
    if code == 0 { Ok(()) } else { Err(code) }
}

/// The text that a function writes into the room that it gets, with zeros after it.
pub(super) fn text(write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> Result<String, Code> {
    let mut bytes = vec![0_u8; TEXT];
    let mut length = 0;
    checked(write(bytes.as_mut_ptr().cast(), &raw mut length))?;
    // Libraries do not agree on whether the length counts the zero at the end.
    let text = CStr::from_bytes_until_nul(&bytes).unwrap_or_default();
    Ok(text.to_string_lossy().into_owned())
}

impl<H: Handle> Calls for Bound<H> {
    fn init(&self) -> Result<bool, Code> {
        let mut provided = 0;
        let (none, funneled) = (ptr::null_mut(), self.values.funneled);
        // SAFETY: null stands for arguments that are not passed on; one int is written.
        checked(unsafe {
            (self.functions.init)(none, ptr::null_mut(), funneled, &raw mut provided)
        })?;
        // SAFETY: MPI runs, and both handles are its own.
        checked(unsafe { (self.functions.set_errors)(self.world, self.errors_return) })?;
        Ok(provided >= funneled)
    }

    fn rank(&self) -> Result<usize, Code> {
        self.number(self.functions.rank)
    }

    fn size(&self) -> Result<usize, Code> {
        self.number(self.functions.size)
    }

    fn host(&self) -> Result<String, Code> {
        // SAFETY: the room is larger than MPI_MAX_PROCESSOR_NAME, which is at most 256.
        text(|room, length| unsafe { (self.functions.host)(room, length) })
    }

    unsafe fn send(
        &self,
        bytes: *const u8,
        length: usize,
        to: usize,
        tag: c_int,
    ) -> Result<Request, Code> {
        let mut request = H::from_number(0);
        // SAFETY: the handles are MPI's, and the caller keeps the bytes.
        checked(unsafe {
            (self.functions.send)(
                bytes.cast(),
                length as c_int,
                self.byte,
                to as c_int,
                tag,
                self.world,
                &raw mut request,
            )
        })?;
        Ok(Request(request.number()))
    }

    unsafe fn receive(
        &self,
        bytes: *mut u8,
        length: usize,
        from: usize,
        tag: c_int,
    ) -> Result<Request, Code> {
        let mut request = H::from_number(0);
        // SAFETY: the handles are MPI's, and the caller keeps the bytes.
        checked(unsafe {
            (self.functions.receive)(
                bytes.cast(),
                length as c_int,
                self.byte,
                from as c_int,
                tag,
                self.world,
                &raw mut request,
            )
        })?;
        Ok(Request(request.number()))
    }

    fn test(&self, request: &mut Request) -> Result<Option<usize>, Code> {
        let mut handle = H::from_number(request.0);
        let (mut done, mut status, mut count) = (0, [0; 32], 0);
        // SAFETY: the handle is that of a request, or the null one after it is over; the status has room for any family's.
        let code =
            unsafe { (self.functions.test)(&raw mut handle, &raw mut done, &raw mut status) };
        request.0 = handle.number();
        checked(code)?;
        if done == 0 {
            return Ok(None);
        }
        // SAFETY: the status is what MPI has just written.
        checked(unsafe { (self.functions.count)(&raw const status, self.byte, &raw mut count) })?;
        Ok(Some(usize::try_from(count).unwrap_or_default()))
    }

    fn cancel(&self, request: &mut Request) {
        let mut handle = H::from_number(request.0);
        // SAFETY: the handle is that of a request that is not over. Whether it worked shows when it is tested.
        unsafe { (self.functions.cancel)(&raw mut handle) };
        request.0 = handle.number();
    }

    fn is_truncated(&self, code: Code) -> bool {
        let mut class = 0;
        // SAFETY: one int is written.
        let failed = unsafe { (self.functions.error_class)(code, &raw mut class) };
        failed == 0 && class == self.values.truncated
    }

    fn explain(&self, code: Code) -> String {
        // SAFETY: the room is larger than MPI_MAX_ERROR_STRING, which is at most 512.
        let text =
            text(|room, length| unsafe { (self.functions.error_string)(code, room, length) });
        text.unwrap_or_else(|_| format!("error {code}"))
    }

    fn abort(&self, code: c_int) {
        // SAFETY: MPI runs, and the handle is its own.
        unsafe { (self.functions.abort)(self.world, code) };
    }

    fn finalize(&self) {
        // SAFETY: MPI runs, and is not called afterwards: whoever calls this gives up the only value that could.
        unsafe { (self.functions.finalize)() };
    }
}
