// The system allocator's habit of giving freed memory back.
#pragma once

namespace interformer {

// Makes glibc's allocator keep what is freed, for the whole process and for good. Returns false, and changes nothing,
// where `malloc` is not glibc's.
bool keep_freed_memory();

}  // namespace interformer
