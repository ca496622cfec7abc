// Loads a .nas file and runs its function `forward` on the inputs of the self-test; see docs/artifact-format.md.
//
//   load_artifact MODEL.nas
//
// prints each output and its largest difference from the expected one. Needs the headers of tvm_ffi, libtvm_ffi and
// libtvm_runtime, nothing else. The file is mapped and the weights are used where they lie.
//
// It is an example of the format, not a guard: it looks at sizes and versions, but computes no checksum. Load only
// files that you trust, or check them with `nas verify` first.

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace ffi = tvm::ffi;

// JSON: objects, lists, texts, numbers; true, false and null are kept as text.
struct Json {
  std::vector<std::pair<std::string, Json>> fields;
  std::vector<Json> items;
  std::string text;
  double number = 0;

  const Json& operator[](const std::string& name) const {
    for (const auto& [key, value] : fields)
      if (key == name) return value;
    throw std::runtime_error("no key " + name);
  }
};

class Parser {
 public:
  explicit Parser(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

  Json Value() {
    Json made;
    char first = Peek();
    if (first == '{') {
      for (Take('{'); Peek() != '}'; Skip(',')) {
        std::string key = Text();
        Take(':');
        made.fields.emplace_back(key, Value());
      }
      Take('}');
    } else if (first == '[') {
      for (Take('['); Peek() != ']'; Skip(',')) made.items.push_back(Value());
      Take(']');
    } else if (first == '"') {
      made.text = Text();
    } else {
      while (at_ < end_ && !std::strchr(",]} \n\r\t", *at_)) made.text += *at_++;
      made.number = std::atof(made.text.c_str());
    }
    return made;
  }

 private:
  char Peek() {
    while (at_ < end_ && std::strchr(" \n\r\t", *at_)) at_++;
    if (at_ >= end_) throw std::runtime_error("JSON ends early");
    return *at_;
  }
  void Take(char wanted) {
    if (Peek() != wanted) throw std::runtime_error("bad JSON");
    at_++;
  }
  void Skip(char optional) {
    if (Peek() == optional) at_++;
  }
  std::string Text() {  // escapes stand for themselves: names in these files have none
    std::string made;
    for (Take('"'); at_ < end_ && *at_ != '"'; at_++) made += *at_;
    at_++;
    return made;
  }

  const char* at_;
  const char* end_;
};

template <typename T>
static T Read(const char* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// The members of the file: what the directory at its end says.
static std::map<std::string, std::string_view> Members(std::string_view file) {
  constexpr size_t kEnd = 22, kDigest = 64, kEntry = 46, kHeader = 30;
  if (file.size() < kEnd + kDigest) throw std::runtime_error("not a .nas file");
  const char* end = file.data() + file.size() - kDigest - kEnd;
  if (Read<uint32_t>(end) != 0x06054b50) throw std::runtime_error("not a .nas file");
  std::map<std::string, std::string_view> members;
  size_t at = Read<uint32_t>(end + 16);
  for (int left = Read<uint16_t>(end + 10); left > 0; left--) {
    if (at + kEntry > file.size()) throw std::runtime_error("a directory that ends early");
    const char* entry = file.data() + at;
    size_t size = Read<uint32_t>(entry + 24), header = Read<uint32_t>(entry + 42);
    uint16_t name = Read<uint16_t>(entry + 28);
    if (at + kEntry + name > file.size() || header + kHeader > file.size()) throw std::runtime_error("a bad entry");
    const char* local = file.data() + header;
    size_t start = header + kHeader + Read<uint16_t>(local + 26) + Read<uint16_t>(local + 28);
    if (start % 64 || start + size > file.size()) throw std::runtime_error("a member that is not aligned, or cut");
    members[std::string(entry + kEntry, name)] = file.substr(start, size);
    at += kEntry + name;
  }
  return members;
}

static DLDataType TypeOf(const std::string& code) {
  if (code == "BOOL") return {kDLBool, 8, 1};
  uint8_t bits = static_cast<uint8_t>(std::atoi(code.c_str() + 1));
  return {static_cast<uint8_t>(code[0] == 'F' ? kDLFloat : code[0] == 'I' ? kDLInt : kDLUInt), bits, 1};
}

// A tensor on memory that belongs to someone else: here the mapped file.
struct Borrowed {
  const char* data;
  void AllocData(DLTensor* tensor) { tensor->data = const_cast<char*>(data); }
  void FreeData(DLTensor*) {}
};

// The arrays of a safetensors member, where they lie.
static std::map<std::string, ffi::Tensor> Tensors(std::string_view member) {
  size_t length = Read<uint64_t>(member.data());
  if (length + 8 > member.size()) throw std::runtime_error("a bad safetensors header");
  const char* data = member.data() + 8 + length;
  std::map<std::string, ffi::Tensor> tensors;
  for (const auto& [name, entry] : Parser(member.substr(8, length)).Value().fields) {
    if (name.rfind("__padding__.", 0) == 0) continue;
    std::vector<int64_t> shape;
    for (const Json& size : entry["shape"].items) shape.push_back(static_cast<int64_t>(size.number));
    Borrowed memory{data + static_cast<size_t>(entry["data_offsets"].items[0].number)};
    DLDevice cpu{kDLCPU, 0};
    tensors.emplace(name, ffi::Tensor::FromNDAlloc(memory, ffi::Shape(shape), TypeOf(entry["dtype"].text), cpu));
  }
  return tensors;
}

static ffi::Module LoadLibrary(std::string_view bytes) {
  char path[] = "/tmp/nas-XXXXXX.so";
  int file = mkstemps(path, 3);
  if (file < 0 || write(file, bytes.data(), bytes.size()) != static_cast<ssize_t>(bytes.size()))
    throw std::runtime_error("cannot unpack the library");
  close(file);
  ffi::Module library = ffi::Module::LoadFromFile(path);
  unlink(path);
  return library;
}

static void Compare(const std::string& name, const ffi::Tensor& found, const ffi::Tensor& expected) {
  const float* left = static_cast<const float*>(found.data_ptr());
  const float* right = static_cast<const float*>(expected.data_ptr());
  size_t count = ffi::GetDataSize(found) / sizeof(float);
  double scale = 0, worst = 0;
  for (size_t i = 0; i < count; i++) {
    scale = std::fmax(scale, std::fabs(right[i]));
    worst = std::fmax(worst, std::fabs(left[i] - right[i]));
  }
  std::printf("%s:", name.c_str());
  for (size_t i = 0; i < count && i < 8; i++) std::printf(" %.6g", left[i]);
  std::printf("%s\n  differs by %.2g of its scale\n", count > 8 ? " ..." : "", worst / (scale > 0 ? scale : 1));
}

static void Run(const char* path) {
  int descriptor = open(path, O_RDONLY);
  struct stat state;
  if (descriptor < 0 || fstat(descriptor, &state) || !state.st_size) throw std::runtime_error("cannot read the file");
  void* mapped = mmap(nullptr, state.st_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, descriptor, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("cannot map the file");
  auto members = Members({static_cast<const char*>(mapped), static_cast<size_t>(state.st_size)});

  Json manifest = Parser(members.at("manifest.json")).Value();
  if (manifest["format_version"].number != 1) throw std::runtime_error("another format version");
  if (!manifest["requires"].items.empty()) throw std::runtime_error("the file needs what this program does not know");
  const Json& function = manifest["functions"]["forward"];
  auto weights = Tensors(members.at("weights.safetensors"));
  auto examples = Tensors(members.at("expected.safetensors"));

  ffi::Module vm = LoadLibrary(members.at("library.so"))->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  vm->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, 2);
  std::vector<ffi::Any> arguments;
  for (const Json& input : function["inputs"].items) arguments.push_back(examples.at("forward.input." + input["name"].text));
  for (const Json& weight : function["weights"].items) arguments.push_back(weights.at(weight.text));
  std::vector<ffi::AnyView> views(arguments.begin(), arguments.end());
  ffi::Any result;
  vm->GetFunction("forward").value().CallPacked(views.data(), static_cast<int32_t>(views.size()), &result);

  std::vector<ffi::Tensor> outputs;
  if (auto one = result.as<ffi::Tensor>()) {
    outputs.push_back(*one);
  } else {
    for (ffi::Tensor tensor : result.cast<ffi::Array<ffi::Tensor>>()) outputs.push_back(tensor);
  }
  for (size_t i = 0; i < outputs.size(); i++) {
    const std::string& name = function["outputs"].items[i]["name"].text;
    Compare(name, outputs[i], examples.at("forward.output." + name));
  }
}

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s MODEL.nas\n", argv[0]);
    return 2;
  }
  try {
    Run(argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what());
    return 1;
  }
  return 0;
}
